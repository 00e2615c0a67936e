-- share_trip: Open the circuit after a local circuit has opened while Redis was unreachable.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit.
-- ARGV[1..9]  shared arguments, see prelude.lua.
-- ARGV[10]    generation  generation of the circuit before the outage.
-- ARGV[11]    open_ms     time since the local circuit opened, milliseconds.
-- RETURNS     {accepted 0|1, record…}, see prelude.lua.
-- TIME        server time: opened_at, as open_ms before now.
-- WRITES      only if accepted.  Refused after a transition since the outage, or if open since the same time or later.
-- USES        circuit, now, run, transition.
local generation, open_ms = tonumber(ARGV[10]), tonumber(ARGV[11])

return run(function()
  local opened_at_ms = math.max(0, now - open_ms)
  local was_open = circuit.state == 'open' and (circuit.opened_at_ms or 0) >= opened_at_ms
  if circuit.generation ~= generation or was_open then return false end
  transition('open')
  circuit.success_counter = 0
  circuit.opened_at_ms = opened_at_ms
  return true
end)
