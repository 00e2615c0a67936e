-- record_success_lane: Reset the consecutive failures after a successful call.
-- ARGV        see record_success.lua.
-- RETURNS     {now_ms, 0, noisy_until_ms} on the lane.
-- USES        lane_failures, lane_noisy_ms, lane_now_ms.
if lane_failures then
  if lane_failures > 0 then redis.call('SET', KEYS[2], '0') end
  return {lane_now_ms, 0, lane_noisy_ms}
end
