-- trip: Open the circuit now.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit.
-- ARGV[1..9]  shared arguments, see prelude.lua.
-- ARGV[10]    generation  generation in which the circuit admitted the call (-1: an operator, or direct use).
-- ARGV[11]    token       token of the probe that the call is (empty: the call is no probe).
-- RETURNS     {accepted 0|1, record…}, see prelude.lua.
-- TIME        server time: opened_at.
-- WRITES      only if accepted: of many simultaneous trips, the first one.
-- USES        can_report, circuit, now, run, transition.
local generation, token = tonumber(ARGV[10]), ARGV[11]

return run(function()
  if not can_report(generation, token) then return false end
  transition('open')
  circuit.success_counter = 0
  circuit.opened_at_ms = now
  return true
end)
