-- lane: Checks of the fast lane, which precede the prelude in the scripts that count calls.
-- KEYS[1..5]  state, fail_counter, success_counter, opened_at, circuit.
-- ARGV[1..9]  shared arguments, see prelude.lua.
-- ARGV[10]    generation  generation in which the circuit admitted the call.
-- ARGV[11]    token       token of the probe that the call is (empty: the call is no probe).
-- RETURNS     nothing: the file of the operation's lane returns {now_ms, fail_counter, noisy_until_ms} on the lane.
-- TIME        server time.
-- WRITES      nothing.
-- OFFERS      lane_failures (nil: not on the lane), lane_noisy_ms, lane_now_ms.
--
-- On the lane are closed circuits without TTLs that are sound as far as counting needs them, in the generation that the
-- caller knows.  There, counting changes one counter, and the caller needs three values.  Values that counting does not
-- need are not read: the listener and the next full script find their damage.  GET and INCR would take less time, but
-- users with the rights of earlier versions may not run them.  Without the lane, each script defines all
-- functions of the prelude, compares eleven values and returns thirteen, which takes three times as long.
local lane_failures, lane_noisy_ms, lane_now_ms

if ARGV[3] == 'closed' and ARGV[10] == ARGV[2] and ARGV[11] == '' and ARGV[9] == '0' then
  local plain = redis.call('MGET', KEYS[1], KEYS[2])
  local hash = redis.pcall('HMGET', KEYS[5], 'generation', 'state', 'noisy_until_ms')
  local failures, noisy_ms = plain[2], hash[3]
  if not hash.err and plain[1] == 'closed' and hash[1] == ARGV[2] and hash[2] == 'closed'
    and failures and #failures < 12 and (failures == '0' or string.find(failures, '^[1-9]%d*$'))
    and noisy_ms and #noisy_ms < 15 and (noisy_ms == '0' or string.find(noisy_ms, '^[1-9]%d*$')) then
    local time = redis.call('TIME')
    local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
    lane_noisy_ms, lane_now_ms = tonumber(noisy_ms), now_ms
    if lane_noisy_ms <= now_ms + 60000 then lane_failures = tonumber(failures) end
  end
end
