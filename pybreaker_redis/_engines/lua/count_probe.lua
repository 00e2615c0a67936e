-- count_probe: a probe succeeded; one more towards the success threshold.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit
-- ARGV[10]    generation  in which the caller was admitted; -1: by hand, which leaves the probe alone
-- ARGV[11]    token       of the probe that the caller holds
-- ARGV[12]    lease_ms    for the close that follows at the threshold, > 0
-- ARGV[13]    threshold   successes that close the circuit; below it the probe is given back
-- RETURNS     {accepted 0|1, record…}
-- TIME        the server's, for the end of the lease
-- WRITES      only if accepted
local generation, token, lease_ms, threshold = tonumber(ARGV[10]), ARGV[11], tonumber(ARGV[12]), tonumber(ARGV[13])

return run(function()
  if not admits(generation, token) then return false end
  circuit.success_counter = after(circuit.success_counter)
  if generation == BY_HAND or circuit.probe_token == '' then return true end
  if circuit.success_counter < threshold then
    free_probe(circuit)
  else
    hold_probe(circuit.probe_token, lease_ms)
  end
  return true
end)
