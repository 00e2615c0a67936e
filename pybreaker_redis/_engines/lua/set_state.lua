-- set_state: by hand, put the circuit into a state, counters as they are.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit
-- ARGV[10]    state  closed | open | half-open
-- RETURNS     {1, record…}
-- TIME        the server's, for a circuit that opens without ever having opened
-- WRITES      only if the state changes, or half-open takes the trial from whoever has it
local state = ARGV[10]

return run(function()
  if circuit.state == state and state ~= 'half-open' then return true end
  move(state)
  if state == 'open' and not circuit.opened_at_ms then circuit.opened_at_ms = now end
  return true
end)
