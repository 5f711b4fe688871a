-- Keep the peaks that one process saw, each as far as it is higher than what stands there; and who that process is.
--
-- KEYS   the peaks, the process
-- ARGV   host and pid of the process, ms that this stays, ms that peaks stay; then two for each peak: its policy, the most
-- Returns 1, or 0 where the process cannot be kept: a user may have been made when nobody needed SET.
for i = 4, #ARGV, 2 do
  redis.call('ZADD', KEYS[1], 'GT', ARGV[i + 1], ARGV[i])
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
local kept = redis.pcall('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
if kept.err then return 0 end
return 1
