-- release_probe: Return a probe without an outcome.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit.
-- ARGV[1..9]  shared arguments, see prelude.lua.
-- ARGV[10]    generation  generation in which the circuit admitted the call (-1: direct use).
-- ARGV[11]    token       token of the probe that the call is.
-- RETURNS     {accepted 0|1, record…}, see prelude.lua.
-- TIME        not used by the operation.
-- WRITES      only if accepted: the probe becomes free.
-- USES        can_report, circuit, free_probe, run.
local generation, token = tonumber(ARGV[10]), ARGV[11]

return run(function()
  if not can_report(generation, token) then return false end
  if circuit.state == 'half-open' then free_probe(circuit) end
  return true
end)
