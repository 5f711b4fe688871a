-- Take one holder away, and leave a tombstone for as long as its lease would have lasted: until then it might come back. Then
-- let in whoever waits for its slot.
--
-- KEYS   the semaphore, the tombstones
-- ARGV   the holder, its token
-- Returns 1 if it was there, else 0.
--
-- It works without memory, too: ZREM needs none, and what a script has begun to change a server lets it finish.
local ends = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not ends then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local left = math.ceil(tonumber(ends) - now)
redis.call('ZREM', KEYS[1], members(ARGV[1]))
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
if left > 0 then
  redis.call('ZADD', KEYS[2], 'GT', ends, ARGV[2])
  if redis.call('PTTL', KEYS[2]) < left then redis.call('PEXPIRE', KEYS[2], left) end
end
if not moves(KEYS[1]) then lines(now).grant({KEYS[1]}) end
return 1
