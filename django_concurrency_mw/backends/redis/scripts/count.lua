-- How much is in flight, without those whose lease has ended. Changes nothing.
--
-- KEYS   one semaphore each
-- Returns one integer each.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local reply = {}
for i, key in ipairs(KEYS) do
  reply[i] = redis.call('ZCOUNT', key, '(' .. string.format('%.0f', now), '+inf')
end
return reply
