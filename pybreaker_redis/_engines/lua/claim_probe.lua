-- claim_probe: Give the one half-open probe to one call.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit.
-- ARGV[1..9]  shared arguments, see prelude.lua.
-- ARGV[10]    generation  generation in which the caller saw the circuit open.
-- ARGV[11]    token       token that is unique for this claim.  A repeated claim is granted again and renews the lease.
-- ARGV[12]    lease_ms    time until another call may claim an unreported probe, milliseconds, > 0.
-- ARGV[13]    lost_token  token of a probe that no call holds any more, and that counts as free (empty: none).
-- RETURNS     {accepted 0|1, record…}, see prelude.lua.
-- TIME        server time: start and end of a lease.
-- WRITES      only if accepted.  A refusal renews no TTL, or the lease of a lost call would outlive its time.
-- USES        circuit, is_probe_free, lease_probe, run, transition.
local generation, token, lease_ms, lost_token = tonumber(ARGV[10]), ARGV[11], tonumber(ARGV[12]), ARGV[13]

return run(function()
  if circuit.probe_token == token then
    lease_probe(token, lease_ms)
    return true
  end
  local is_free = is_probe_free() or (lost_token ~= '' and circuit.probe_token == lost_token)
  if circuit.generation ~= generation or not (circuit.state == 'open' or is_free) then return false end
  -- Successes of a call that never reported count.  Successes from before the circuit opened do not.
  if circuit.state == 'open' then circuit.success_counter = 0 end
  transition('half-open')
  lease_probe(token, lease_ms)
  return true
end)
