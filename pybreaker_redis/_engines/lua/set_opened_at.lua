-- set_opened_at: Set the time at which the circuit opened.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit.
-- ARGV[1..9]  shared arguments, see prelude.lua.
-- ARGV[10]    at_ms  time of the opening by the server's clock, milliseconds since the epoch.
-- RETURNS     {accepted 0|1, record…}, see prelude.lua.
-- TIME        server time: a later time counts as now.
-- WRITES      only if accepted.  An open circuit accepts only a later time.
-- USES        circuit, now, run.
local at_ms = tonumber(ARGV[10])

return run(function()
  at_ms = math.max(0, math.min(at_ms, now))
  if circuit.state == 'open' and circuit.opened_at_ms and at_ms <= circuit.opened_at_ms then return false end
  circuit.opened_at_ms = at_ms
  return true
end)
