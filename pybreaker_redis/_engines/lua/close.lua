-- close: close the circuit and forget all counts.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit
-- ARGV[10]    generation  in which the successful probe was admitted; -1: an operator closes it
-- ARGV[11]    token       of the probe that the caller holds, or empty
-- RETURNS     {accepted 0|1, record…}
-- WRITES      only if accepted
local generation, token = tonumber(ARGV[10]), ARGV[11]

return run(function()
  if not admits(generation, token) then return false end
  if circuit.state ~= 'closed' then move('closed') end
  circuit.fail_counter = 0
  circuit.success_counter = 0
  return true
end)
