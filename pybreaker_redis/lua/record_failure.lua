-- record_failure: a guarded call failed; one more consecutive failure.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit
-- ARGV[7]     generation  in which the caller was admitted; -1: by hand
-- ARGV[8]     token       of the probe that the caller holds, or empty
-- RETURNS     {accepted 0|1, record…}
-- WRITES      only if accepted
local generation, token = tonumber(ARGV[7]), ARGV[8]

return run(function()
  if not admits(generation, token) then return false end
  circuit.fail_counter = after(circuit.fail_counter)
  return true
end)
