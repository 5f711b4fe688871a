-- Let leases end later, of holders that are still there and have not lapsed.
--
-- KEYS   the semaphore of each holder
-- ARGV   two for each: lease in ms from now, the holder
-- Returns one integer each: 1 if it is held, 0 if it is gone (a lapsed one is never brought back), -1 for a key of another type,
--         which is in the way of nobody else.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local reply = {}
for i, key in ipairs(KEYS) do
  local lease = tonumber(ARGV[2 * i - 1])
  local ends = redis.pcall('ZSCORE', key, ARGV[2 * i])
  if type(ends) == 'table' then
    reply[i] = -1
  elseif ends and tonumber(ends) > now then
    redis.call('ZADD', key, 'XX', members(ARGV[2 * i], now + lease))
    if redis.call('PTTL', key) < lease then redis.call('PEXPIRE', key, lease) end
    reply[i] = 1
  else
    reply[i] = 0
  end
end
return reply
