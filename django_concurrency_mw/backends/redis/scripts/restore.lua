-- Count holders again that this server has lost; nobody who stands there lapsed, or was evicted.
--
-- KEYS   the semaphore of each holder, then the tombstones
-- ARGV   four for each: the ms of this server's clock after which it must not happen any more, lease in ms from now, the
--        holder, its token
-- Returns one integer each: 1 if it is held now, else 0.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local reply = {}
for i = 1, #KEYS - 1 do
  local key, lease, holder = KEYS[i], tonumber(ARGV[4 * i - 2]), ARGV[4 * i - 1]
  local ends = redis.call('ZSCORE', key, holder)
  reply[i] = 0
  if ends then
    if tonumber(ends) > now then reply[i] = 1 end
  elseif now < tonumber(ARGV[4 * i - 3]) and not redis.call('ZSCORE', KEYS[#KEYS], ARGV[4 * i]) then
    reply[i] = 1
  end
  if reply[i] == 1 then
    redis.call('ZADD', key, now + lease, holder)
    if redis.call('PTTL', key) < lease then redis.call('PEXPIRE', key, lease) end
  end
end
return reply
