-- record_failure_lane: Count one failed call below the threshold while the circuit is noisy.
-- ARGV        see record_failure.lua.
-- RETURNS     {now_ms, fail_counter, noisy_until_ms} on the lane.
-- USES        lane_failures, lane_noisy_ms, lane_now_ms.
if lane_failures and ARGV[13] == '1' then
  local failures, noise_ms, threshold = lane_failures + 1, tonumber(ARGV[12]), tonumber(ARGV[14])
  if (threshold == 0 or failures < threshold) and (noise_ms == 0 or lane_noisy_ms >= lane_now_ms + noise_ms / 2) then
    redis.call('SET', KEYS[2], failures)
    return {lane_now_ms, failures, lane_noisy_ms}
  end
end
