-- record_success: Reset the consecutive failures after a successful call.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit.
-- ARGV[1..9]  shared arguments, see prelude.lua.
-- ARGV[10]    generation  generation in which the circuit admitted the call (-1: an operator, or direct use).
-- ARGV[11]    token       token of the probe that the call is (empty: the call is no probe).
-- RETURNS     {accepted 0|1, record…}, see prelude.lua.
-- TIME        not used by the operation.
-- WRITES      only if accepted.
-- USES        can_report, circuit, run.
local generation, token = tonumber(ARGV[10]), ARGV[11]

return run(function()
  if not can_report(generation, token) then return false end
  circuit.fail_counter = 0
  return true
end)
