-- count_probe: Count a successful probe towards the success threshold.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit.
-- ARGV[1..9]  shared arguments, see prelude.lua.
-- ARGV[10]    generation  generation in which the circuit admitted the call (-1: direct use, which leaves the probe).
-- ARGV[11]    token       token of the probe that the call is.
-- ARGV[12]    lease_ms    time in which the call must close the circuit at the threshold, milliseconds, > 0.
-- ARGV[13]    threshold   number of successes that close the circuit.  Below that, the probe becomes free.
-- RETURNS     {accepted 0|1, record…}, see prelude.lua.
-- TIME        server time: end of the lease.
-- WRITES      only if accepted.
-- USES        BY_HAND, can_report, circuit, free_probe, lease_probe, next_count, run.
local generation, token, lease_ms, threshold = tonumber(ARGV[10]), ARGV[11], tonumber(ARGV[12]), tonumber(ARGV[13])

return run(function()
  if not can_report(generation, token) then return false end
  circuit.success_counter = next_count(circuit.success_counter)
  if generation == BY_HAND or circuit.probe_token == '' then return true end
  circuit.fail_counter = 0
  if circuit.success_counter < threshold then
    free_probe(circuit)
  else
    lease_probe(circuit.probe_token, lease_ms)
  end
  return true
end)
