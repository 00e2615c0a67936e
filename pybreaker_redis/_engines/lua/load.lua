-- load: what is true of the circuit?
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit
-- RETURNS     {1, record…}
-- WRITES      only to create, repair or adopt; with a ttl it gives one to keys that have none
return run(function()
  return true
end, true)
