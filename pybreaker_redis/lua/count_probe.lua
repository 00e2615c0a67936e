-- count_probe: a probe succeeded; one more towards the success threshold, and its holder may go on probing.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit
-- ARGV[9]     generation  in which the caller was admitted; -1: by hand, which renews nobody's lease
-- ARGV[10]    token       of the probe that the caller holds
-- ARGV[11]    lease_ms    for the next probe, > 0
-- RETURNS     {accepted 0|1, record…}
-- TIME        the server's, for the end of the lease
-- WRITES      only if accepted
local generation, token, lease_ms = tonumber(ARGV[9]), ARGV[10], tonumber(ARGV[11])

return run(function()
  if not admits(generation, token) then return false end
  circuit.success_counter = after(circuit.success_counter)
  if generation ~= BY_HAND and circuit.probe_token ~= '' then
    circuit.probe_until_ms = now + lease_ms
  end
  return true
end)
