-- Let in whoever is next, after slots were given back. It does not free them itself: ZREM does, before it in the same packet,
-- and needs no script that a server may have forgotten.
--
-- KEYS   the semaphore of each slot
-- ARGV   the token of each
-- Returns how many were let in.
--
-- Who gives back does not wait any more either: it leaves all lines.
local due, known, records = {}, {}, {}
for i, key in ipairs(KEYS) do records[i] = record(key, ARGV[i]) end
records = redis.call('MGET', unpack(records))
for i, key in ipairs(KEYS) do
  if not known[key] and (records[i] or redis.call('ZCARD', beside(key, 'queue')) > 0) then
    due[#due + 1], known[key] = key, true
  end
end
if not due[1] then return 0 end
if moves(KEYS[1]) then return redis.error_reply('TRYAGAIN the hash slot is moving') end -- it is left over, and sent again
local time = redis.call('TIME')
local line = lines(time[1] * 1000 + math.floor(time[2] / 1000))
for i, key in ipairs(KEYS) do
  local left = {}
  if records[i] then line.leave(line.described(ARGV[i], records[i]), left) end
  redis.call('ZREM', beside(key, 'queue'), ARGV[i])
  for _, other in ipairs(left) do
    if not known[other] then due[#due + 1], known[other] = other, true end
  end
end
line.grant(due)
return line.granted
