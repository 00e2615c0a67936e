-- share_trip: open the circuit for all because it has opened in a process that was cut off.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit
-- ARGV[10]    generation  the circuit's when the process was cut off
-- ARGV[11]    open_ms     for how long it has been open there
-- RETURNS     {accepted 0|1, record…}
-- TIME        the server's: a length of time is the same by all clocks
-- WRITES      only if accepted: whoever moved the circuit meanwhile or opened it later knows better
local generation, open_ms = tonumber(ARGV[10]), tonumber(ARGV[11])

return run(function()
  local opened_at_ms = math.max(0, now - open_ms)
  local was_open = circuit.state == 'open' and (circuit.opened_at_ms or 0) >= opened_at_ms
  if circuit.generation ~= generation or was_open then return false end
  move('open')
  circuit.success_counter = 0
  circuit.opened_at_ms = opened_at_ms
  return true
end)
