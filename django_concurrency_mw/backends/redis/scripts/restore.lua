-- Count holders again that this server has lost; nobody who stands there lapsed, or was evicted.
--
-- KEYS   the semaphore of each holder, then the tombstones
-- ARGV   four for each: the ms of this server's clock when its lease may have ended, lease in ms from now, the holder, its
--        token; then the ms after which this call must not bring anybody back any more
-- Returns one integer each: 1 if it is held now, 0 if it is gone, 2 if this call came too late, -1 for a key of another type.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local reply = {}
for i = 1, #KEYS - 1 do
  local key, lease, holder = KEYS[i], tonumber(ARGV[4 * i - 2]), ARGV[4 * i - 1]
  local ends = redis.pcall('ZSCORE', key, holder)
  reply[i] = 0
  if type(ends) == 'table' then
    reply[i] = -1
  elseif ends then
    if tonumber(ends) > now then reply[i] = 1 end
  elseif now < tonumber(ARGV[4 * i - 3])
    and tonumber(redis.call('ZSCORE', KEYS[#KEYS], ARGV[4 * i]) or 0) <= now then
    if now < tonumber(ARGV[#ARGV]) then reply[i] = 1 else reply[i] = 2 end
  end
  if reply[i] == 1 then
    redis.call('ZADD', key, members(holder, now + lease))
    if redis.call('PTTL', key) < lease then redis.call('PEXPIRE', key, lease) end
  end
end
return reply
