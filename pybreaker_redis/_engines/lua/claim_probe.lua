-- claim_probe: hand the one half-open probe to one caller.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit
-- ARGV[10]    generation  that the caller saw open
-- ARGV[11]    token       unique per claim; a repeated claim is granted again and renews the lease
-- ARGV[12]    lease_ms    until an unreported probe is offered again, > 0
-- ARGV[13]    instead     token of a probe that no call holds any more, which counts as free; empty: none
-- RETURNS     {accepted 0|1, record…}
-- TIME        the server's; clocks of callers are never compared
-- WRITES      only if accepted
-- A refusal touches nothing, TTLs included: it would keep a dead prober's lease alive.
local generation, token, lease_ms, instead = tonumber(ARGV[10]), ARGV[11], tonumber(ARGV[12]), ARGV[13]

return run(function()
  if circuit.probe_token == token then
    hold_probe(token, lease_ms)
    return true
  end
  local is_free = probe_is_free() or (instead ~= '' and circuit.probe_token == instead)
  if circuit.generation ~= generation or not (circuit.state == 'open' or is_free) then return false end
  -- Successes collected by a prober that died still count; those from before the circuit opened do not.
  if circuit.state == 'open' then circuit.success_counter = 0 end
  move('half-open')
  hold_probe(token, lease_ms)
  return true
end)
