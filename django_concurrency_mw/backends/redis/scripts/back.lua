-- Take back what was granted to one who is not there any more, and let in whoever is next.
--
-- KEYS   its record
-- ARGV   its token
-- Returns 1, or 0 where there was nothing to take back: the record of one who was let in stays until it has asked, so whoever
--        has asked since holds for good, and is left alone.
local text = redis.call('MGET', KEYS[1])[1]
if not text then return 0 end
local time = redis.call('TIME')
local line = lines(time[1] * 1000 + math.floor(time[2] / 1000))
local one = line.described(ARGV[1], text)
local due = {}
for _, slot in ipairs(one.slots) do
  if redis.call('ZREM', slot.key, members(slot.holder)) > 0 then due[#due + 1] = slot.key end
end
line.grant(line.leave(one, due))
return 1
