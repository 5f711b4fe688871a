-- Take back what was granted to one who is not there any more, and let in whoever is next.
--
-- KEYS   its record
-- ARGV   its token
-- Returns 1, or 0 where there was nothing to take back: the record of one who was let in stays until it has asked, so whoever
--        has asked since holds for good, and is left alone. So is whoever was counted again, which holds for longer than its
--        record is there; and all who hold while their keys' hash slot `moves`: what they were let in to ends by itself.
local text = redis.call('MGET', KEYS[1])[1]
if not text or moves(KEYS[1]) then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local line = lines(now)
local last = now + redis.call('PTTL', KEYS[1])
local one = line.described(ARGV[1], text)
local due = {}
for _, slot in ipairs(one.slots) do
  local ends = redis.call('ZSCORE', slot.key, slot.holder)
  if ends and tonumber(ends) <= last then
    redis.call('ZREM', slot.key, members(slot.holder))
    due[#due + 1] = slot.key
  end
end
line.grant(line.leave(one, due))
return 1
