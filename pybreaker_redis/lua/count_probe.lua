-- count_probe: a probe succeeded; one more towards the success threshold, and its holder may go on probing.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit
-- ARGV[10]    generation  in which the caller was admitted; -1: by hand, which renews nobody's lease
-- ARGV[11]    token       of the probe that the caller holds
-- ARGV[12]    lease_ms    for the next probe, > 0
-- RETURNS     {accepted 0|1, record…}
-- TIME        the server's, for the end of the lease
-- WRITES      only if accepted
local generation, token, lease_ms = tonumber(ARGV[10]), ARGV[11], tonumber(ARGV[12])

return run(function()
  if not admits(generation, token) then return false end
  circuit.success_counter = after(circuit.success_counter)
  if generation ~= BY_HAND and circuit.probe_token ~= '' then
    hold_probe(circuit.probe_token, lease_ms)
  end
  return true
end)
