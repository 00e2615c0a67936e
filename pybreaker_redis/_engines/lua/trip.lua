-- trip: open the circuit, from now on.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit
-- ARGV[10]    generation  in which the failed call was admitted; -1: an operator opens it
-- ARGV[11]    token       of the probe that the caller holds, or empty
-- RETURNS     {accepted 0|1, record…}
-- TIME        the server's: a host whose clock is ahead cannot hold the fleet open
-- WRITES      only if accepted: the first of many simultaneous trips is the one
local generation, token = tonumber(ARGV[10]), ARGV[11]

return run(function()
  if not admits(generation, token) then return false end
  move('open')
  circuit.success_counter = 0
  circuit.opened_at_ms = now
  return true
end)
