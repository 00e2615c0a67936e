-- set_state: Set the state, and leave the counters.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit.
-- ARGV[1..9]  shared arguments, see prelude.lua.
-- ARGV[10]    state  closed | open | half-open.
-- RETURNS     {1, record…}, see prelude.lua.
-- TIME        server time: opened_at of a circuit that opens for the first time.
-- WRITES      only if the state changes, or if half-open frees the probe.
-- USES        circuit, now, run, transition.
local state = ARGV[10]

return run(function()
  if circuit.state == state and state ~= 'half-open' then return true end
  transition(state)
  if state == 'open' and not circuit.opened_at_ms then circuit.opened_at_ms = now end
  return true
end)
