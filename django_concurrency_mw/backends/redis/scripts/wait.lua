-- Take a slot of every blocking semaphore, in turn; or stand in the lines of those that are full; or see how that stands.
--
-- KEYS   the semaphore of each slot
-- ARGV   the token; its record: what others have to know of it to let it in, see `wire`; ms that this is kept; then one for
--        each slot: how many may stand in its line, -1 where it is not waited for
-- Returns 0 (all are held), 1 (some are full, and it stands in no line), 2 (nor may it, as too many do) or 3 (it does); then one
--         each as `take` says it; after 3 also how many stand before it, and the ms until it is worth asking again; after 1
--         also 1 if it may still stand in a line that is not here, as the hash slot `moves`.
--
-- Asking twice is asking once: it keeps its places, and who was let in meanwhile holds. While the keys' hash slot `moves` who
-- asks first has what is free, and all others ask again.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local token, place = ARGV[1], tonumber(ARGV[3])
local line = lines(now, token)
local one = line.described(token, ARGV[2])
local away = moves(KEYS[1])
local stands = {}
if not away then line.come_back(one) end
for i, slot in ipairs(one.slots) do
  if not away then
    mark(slot.key, math.max(slot.lease, PLACE))
    stands[i] = redis.call('ZCARD', beside(slot.key, 'queue')) > 0
  end
end

-- First those before it: something may have become free without a word, or they are dead. Where it is the first itself and
-- there is room, it is let in by this, or else taken out of that line and those behind it are let in.
repeat
  local before = line.granted
  for i, slot in ipairs(one.slots) do
    if stands[i] then line.grant({slot.key}) end
  end
until line.granted == before

-- Where it cannot have all it has nothing: what it was let in to before, of which the rest has lapsed, is for the next ones.
local full, any, freed
repeat
  full, any, freed = {}, false, {}
  for i, slot in ipairs(one.slots) do
    local other = line.stops[slot.key]
    full[i] = not redis.call('ZSCORE', slot.key, slot.holder)
      and (other ~= nil and other ~= token or not line.has_room(slot))
    any = any or (full[i] and slot.blocks)
  end
  for i, slot in ipairs(one.slots) do
    if any and not full[i] and redis.call('ZREM', slot.key, members(slot.holder)) > 0 then freed[#freed + 1] = slot.key end
  end
  if not away then line.grant(freed) end
until not freed[1]

local function reply(verdict)
  local list = {verdict}
  for i, slot in ipairs(one.slots) do
    list[i + 1] = 2 * redis.call('ZCARD', slot.key) + (full[i] and 0 or 1)
  end
  return list
end

if not any then
  for i, slot in ipairs(one.slots) do
    if not full[i] then line.hold(slot, slot.lease) end
  end
  if away then -- whoever walks along its lines finds it gone, if its record is here; else its release says so, later
    redis.pcall('PEXPIRE', record(one.slots[1].key, token), 0)
    return reply(0)
  end
  local left, list = line.leave(one, {}), reply(0)
  line.grant(left)
  return list
end

local verdict = 3
for i, slot in ipairs(one.slots) do
  if full[i] and slot.blocks then
    local queue, most = beside(slot.key, 'queue'), tonumber(ARGV[3 + i])
    if most < 0 then
      verdict = 1
    elseif verdict == 3 and not away and not redis.call('ZSCORE', queue, token) and redis.call('ZCARD', queue) >= most
      and line.living(slot.key) >= most then
      verdict = 2
    end
  end
end
if verdict < 3 then
  if not away then
    line.grant(line.leave(one, {}))
    return reply(verdict)
  end
  local list = reply(verdict)
  list[#list + 1] = 1
  return list
end

local list, ahead, again = reply(3), 0, 1000
if away then -- it stands nowhere, or where it stood before, and asks often
  list[#list + 1] = 0
  list[#list + 1] = 50
  return list
end
redis.call('SET', record(one.slots[1].key, token), ARGV[2], 'PX', place)
for i, slot in ipairs(one.slots) do
  local queue = beside(slot.key, 'queue')
  if full[i] and slot.blocks then
    local number = redis.call('ZSCORE', queue, token)
    if not number then
      number = line.next_number(queue, time[1] * 1000000 + time[2])
      redis.call('ZADD', queue, number, token)
    end
    redis.call('PEXPIRE', queue, PLACE)
    ahead = math.max(ahead, redis.call('ZCOUNT', queue, '-inf', '(' .. string.format('%.0f', number)))
    again = math.min(again, slot.lease / 3)
    if (line.stops[slot.key] or token) == token then -- nobody tells when a lease ends: the first has to look
      local first = redis.call('ZRANGEBYSCORE', slot.key, '-inf', '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
      if first[2] then again = math.min(again, first[2] - now + 1) end
    end
  end
end
list[#list + 1] = ahead
list[#list + 1] = math.max(0, math.ceil(again))
return list
