-- load: Read the circuit.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit.
-- ARGV[1..9]  shared arguments, see prelude.lua.
-- RETURNS     {1, record…}, see prelude.lua.
-- TIME        not used by the operation.
-- WRITES      only to create, repair or adopt the record.  With ttl_ms, a TTL for keys without one.
-- USES        run.
return run(function()
  return true
end, true)
