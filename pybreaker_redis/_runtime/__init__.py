"""What every package stands on: clock, threads, forks, signals, validation."""
