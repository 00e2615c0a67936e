-- reset_probes: by hand, forget the successes that were collected while half-open.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit
-- RETURNS     {1, record…}
-- WRITES      only if there were any
return run(function()
  circuit.success_counter = 0
  return true
end)
