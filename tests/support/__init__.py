"""What tests share: servers, clients, faults, fleets, clocks; the only place that reaches in."""
