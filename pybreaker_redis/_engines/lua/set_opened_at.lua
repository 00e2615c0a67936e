-- set_opened_at: by hand, say when the circuit opened.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit
-- ARGV[10]    at_ms  since the epoch, by the server's clock
-- RETURNS     {accepted 0|1, record…}
-- TIME        the server's: nothing opened in the future
-- WRITES      only if accepted: while the circuit is open, the time only moves forward
local at_ms = tonumber(ARGV[10])

return run(function()
  at_ms = math.max(0, math.min(at_ms, now))
  if circuit.state == 'open' and circuit.opened_at_ms and at_ms <= circuit.opened_at_ms then return false end
  circuit.opened_at_ms = at_ms
  return true
end)
