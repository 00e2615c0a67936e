-- record_failure: a guarded call failed; one more consecutive failure.  Or several, that a process has counted by itself.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit
-- ARGV[10]    generation  in which the caller was admitted; -1: by hand
-- ARGV[11]    token       of the probe that the caller holds, or empty
-- ARGV[12]    noise_ms    for how long successes are to be reported to somebody who listens, ms; 0: nobody listens
-- ARGV[13]    times       how many there were
-- RETURNS     {accepted 0|1, record…}
-- TIME        the server's, for the end of the noise
-- WRITES      only if accepted
-- However fast calls fail, the noise moves on twice in its time: each move is heard by every process.
local generation, token, noise_ms, times = tonumber(ARGV[10]), ARGV[11], tonumber(ARGV[12]), tonumber(ARGV[13])

return run(function()
  if not admits(generation, token) then return false end
  circuit.fail_counter = after(circuit.fail_counter, times)
  if noise_ms > 0 and circuit.state == 'closed' and circuit.noisy_until_ms < now + noise_ms / 2 then
    circuit.noisy_until_ms = now + noise_ms
  end
  return true
end)
