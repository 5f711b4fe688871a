-- Let in whoever is next, after slots were given back. It does not free them itself: ZREM does, before it in the same packet,
-- and needs no script that a server may have forgotten.
--
-- KEYS   the semaphore of each slot
-- ARGV   the token of each
-- Returns how many were let in.
--
-- Who gives back does not wait any more either: it leaves all lines. While the keys' hash slot moves nobody knows what those are,
-- and this is left over and sent again, long after the ZREM: what it was let in to meanwhile is given back, too.
local due, known, records = {}, {}, {}
for i, key in ipairs(KEYS) do records[i] = record(key, ARGV[i]) end
records[#KEYS + 1] = nothing(KEYS[1])
records = redis.call('MGET', unpack(records)) -- where the slot moves this is refused: see `moves`
for i, key in ipairs(KEYS) do
  if not known[key] and (records[i] or redis.call('ZCARD', beside(key, 'queue')) > 0) then
    due[#due + 1], known[key] = key, true
  end
end
if not due[1] then return 0 end
local time = redis.call('TIME')
local line = lines(time[1] * 1000 + math.floor(time[2] / 1000))
for i, key in ipairs(KEYS) do
  local left = {}
  if records[i] then
    local one = line.described(ARGV[i], records[i])
    for _, slot in ipairs(one.slots) do
      if redis.call('ZREM', slot.key, members(slot.holder)) > 0 then left[#left + 1] = slot.key end
    end
    line.leave(one, left)
  end
  redis.call('ZREM', beside(key, 'queue'), ARGV[i])
  for _, other in ipairs(left) do
    if not known[other] then due[#due + 1], known[other] = other, true end
  end
end
line.grant(due)
return line.granted
