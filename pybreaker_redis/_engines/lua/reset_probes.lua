-- reset_probes: Reset the successes that were counted while half-open.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit.
-- ARGV[1..9]  shared arguments, see prelude.lua.
-- RETURNS     {1, record…}, see prelude.lua.
-- TIME        not used by the operation.
-- WRITES      only if there were successes.
-- USES        circuit, run.
return run(function()
  circuit.success_counter = 0
  return true
end)
