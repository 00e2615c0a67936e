-- record_failure: Count one or more failed calls, and open the circuit at the threshold.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit.
-- ARGV[1..9]  shared arguments, see prelude.lua.
-- ARGV[10]    generation  generation in which the circuit admitted the call (-1: an operator, or direct use).
-- ARGV[11]    token       token of the probe that the call is (empty: the call is no probe).
-- ARGV[12]    noise_ms    duration of the noise after this failure, milliseconds (0: no process receives pushes).
-- ARGV[13]    times       number of failures.
-- ARGV[14]    threshold   count that opens the circuit (0: only count).  A failed probe opens the circuit, too.
-- RETURNS     {accepted 0|1, record…}, see prelude.lua.
-- TIME        server time: end of the noise, opened_at.
-- WRITES      only if accepted.  The noise at most twice in its duration, because each renewal is published.
-- USES        can_report, circuit, next_count, now, run, transition.
local generation, token, noise_ms, times, threshold =
  tonumber(ARGV[10]), ARGV[11], tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14])

return run(function()
  if not can_report(generation, token) then return false end
  circuit.fail_counter = next_count(circuit.fail_counter, times)
  if threshold > 0 and (circuit.state == 'half-open' or circuit.fail_counter >= threshold) then
    transition('open')
    circuit.success_counter = 0
    circuit.opened_at_ms = now
    return true
  end
  if noise_ms > 0 and circuit.state == 'closed' and circuit.noisy_until_ms < now + noise_ms / 2 then
    circuit.noisy_until_ms = now + noise_ms
  end
  return true
end)
