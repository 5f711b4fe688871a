-- Let other holders take the place of those that were handed over: of all of them or of none.
--
-- KEYS   the semaphore of each
-- ARGV   three for each: lease in ms from now, the old holder, the new one
-- Returns 1, or 2 where somebody may wait for anything here, or 0 where an old one is gone or lapsed and nothing was changed.
--
-- Asking twice is asking once, as a command whose connection is lost is sent again: who has the new one has claimed the old.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local claimed = {}
for i, key in ipairs(KEYS) do
  local ends = redis.call('ZSCORE', key, ARGV[3 * i])
  claimed[i] = ends and tonumber(ends) > now
  if not claimed[i] then
    ends = redis.call('ZSCORE', key, ARGV[3 * i - 1])
    if not ends or tonumber(ends) <= now then return 0 end
  end
end
for i, key in ipairs(KEYS) do
  if not claimed[i] then
    local lease = tonumber(ARGV[3 * i - 2])
    redis.call('ZADD', key, members(ARGV[3 * i], now + lease))
    redis.call('ZREM', key, members(ARGV[3 * i - 1]))
    if redis.call('PTTL', key) < lease then redis.call('PEXPIRE', key, lease) end
  end
end
if not KEYS[1] then return 1 end
local left = redis.pcall('PTTL', string.match(KEYS[1], '^[^}]*}:1:') .. '!waits')
if type(left) == 'table' or left >= 0 then return 2 end -- of a slot that moves nobody knows: see `moves`
return 1
