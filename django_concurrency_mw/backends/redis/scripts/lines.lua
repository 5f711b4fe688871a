-- The lines: who waits for which semaphore, in which order, and who is next. See `wire` for the keys.
--
-- This text goes after `members`, before each script that lets others in. `now` is ms of the server's clock; `asker` a token
-- that needs not be told, as it is the one who asks. Times of granted leases are short (`GRANT`): whoever lives asks at once,
-- and has its whole lease then; whoever does not keeps nobody waiting for long.
--
-- `grant(keys)` lets in whoever is next there. `stops[key]` is then who is next and has no room yet, if anybody, and
-- `granted` how many were let in so far. Of a process that does not listen nobody is let in: it is dead, or will ask. One
-- without a channel asks often by itself, and is waited for.
local PLACE, GRANT = 5000, 5000
local function beside(key, name)
  return (string.gsub(key, '}:1:', '}:1:!' .. name .. ':', 1))
end
local function record(key, token)
  return string.match(key, '^[^}]*}:1:') .. '!waiter:' .. token
end
-- Is the hash slot of all these keys moving to another node of a Cluster? Some of them are there then and some are here, and a
-- command that names two that nobody has is refused at both nodes. Nobody stands in a line then, and nobody is let in by others:
-- a key that was made at the new node would be in the way of the one that comes.
local function nothing(key)
  return string.match(key, '^[^}]*}:1:') .. '!nothing'
end
local function moves(key)
  local reply = redis.pcall('MGET', nothing(key) .. ':1', nothing(key) .. ':2')
  if reply.err == nil then return false end
  local function says(words) return string.find(reply.err, words, 1, true) ~= nil end
  return says('non local key') or says('rehashing of the slot') -- the latter: Redis 7.2 and Valkey 8, where it is the new node
end
local function place(key, token)
  return beside(key, 'place') .. ':' .. token
end
-- Who may wait is marked for `length` ms at least: once for all semaphores of a policy, as there are as many of those as there
-- are clients, and for the whole prefix, so that a take need not ask about each policy where nobody waits at all. No other
-- commands: a user may be allowed no more than takes needed before there were lines.
local function mark_of(key)
  return (string.gsub(string.match(key, '^(.*):'), '}:1:', '}:1:!waits:', 1))
end
local function mark(key, length)
  local name = mark_of(key)
  if redis.call('PTTL', name) < length then
    local whole = string.match(key, '^[^}]*}:1:') .. '!waits'
    redis.call('SET', name, '1', 'PX', 2 * length)
    if redis.call('PTTL', whole) < 2 * length then redis.call('SET', whole, '1', 'PX', 4 * length) end
  end
end
local function lines(now, asker)
  local self = {stops = {}, granted = 0}
  local heard, deaf = {}, false

  -- The fields of a record, the first `most` or all: `length:field` each.
  local function fields(text, most)
    local list, at = {}, 1
    while at <= #text and #list ~= most do
      local colon = string.find(text, ':', at, true)
      local stop = colon + tonumber(string.sub(text, at, colon - 1))
      list[#list + 1] = string.sub(text, colon + 1, stop)
      at = stop + 1
    end
    return list
  end

  function self.described(token, text)
    local list = fields(text)
    local one = {token = token, channel = list[1], slots = {}}
    for at = 2, #list, 5 do
      local asked = tonumber(list[at + 3]) % 4096
      one.slots[#one.slots + 1] = {
        key = list[at], limit = tonumber(list[at + 1]), lease = tonumber(list[at + 2]),
        blocks = asked % 2 == 1, cost = math.floor(asked / 2) + 1, holder = list[at + 4],
      }
    end
    return one
  end

  local function listens(token, channel)
    if token == asker or channel == '' then return true end
    if heard[channel] == nil then
      local reply = redis.pcall('PUBSUB', 'NUMSUB', channel)
      heard[channel] = reply.err ~= nil or reply[2] > 0
      deaf = deaf or not heard[channel]
    end
    return heard[channel]
  end

  local function tell(one)
    if one.token == asker then return true end
    if one.channel == '' or heard[one.channel] == false then return false end
    local reply = redis.pcall('PUBLISH', one.channel, one.token)
    if type(reply) ~= 'number' then return false end
    heard[one.channel] = reply > 0
    deaf = deaf or reply == 0
    return reply > 0
  end

  -- Who does not listen is taken out of the line: nobody walks along the dead twice. If it connects again it has its number
  -- back with its next question, see `come_back`.
  local function skip(key, token, number)
    redis.call('SET', place(key, token), number, 'PX', PLACE)
    redis.call('ZREM', beside(key, 'queue'), token)
  end

  -- Walk along a line: gives a token, its record and its number; whoever it gave before is out of the line by then. Who has not
  -- asked for long is taken out. The first is mostly the only one to be looked at; where one was deaf, others are asked about
  -- before anybody looks at what they want.
  local function walk(key)
    local queue, size, at = beside(key, 'queue'), 1, -1
    local list, texts, gone = {}, {}, {}
    local placed, recorded = place(key, ''), record(key, '')
    local function take_out()
      if gone[1] then redis.call('ZREM', queue, unpack(gone)) end
      gone = {}
    end
    return function()
      while true do
        at = at + 2
        if not list[at] then
          take_out()
          list = redis.call('ZRANGEBYSCORE', queue, '-inf', '+inf', 'WITHSCORES', 'LIMIT', 0, size)
          if not list[1] then return nil end
          local names = {}
          for each = 1, #list, 2 do names[#names + 1] = recorded .. list[each] end
          texts = redis.call('MGET', unpack(names))
          at, size = 1, math.min(4 * size, 64)
        end
        local token, text, number = list[at], texts[(at + 1) / 2], list[at + 1]
        if text and not (deaf and not listens(token, fields(text, 1)[1])) then
          take_out()
          return token, text, number
        end
        if text then redis.call('SET', placed .. token, number, 'PX', PLACE) end
        gone[#gone + 1] = token
      end
    end
  end

  -- This one does not listen now, or did not for a while, and asks again: it stands where it stood.
  function self.come_back(one)
    local names = {}
    for i, slot in ipairs(one.slots) do names[i] = place(slot.key, one.token) end
    for i, number in ipairs(redis.call('MGET', unpack(names))) do
      if number then
        redis.call('ZADD', beside(one.slots[i].key, 'queue'), number, one.token)
        redis.call('PEXPIRE', names[i], 0)
      end
    end
  end

  function self.count(slot)
    local count = redis.call('ZCARD', slot.key)
    if count + slot.cost > slot.limit and redis.call('ZREMRANGEBYSCORE', slot.key, '-inf', now) > 0 then
      count = redis.call('ZCARD', slot.key)
    end
    return count
  end

  function self.has_room(slot)
    return self.count(slot) + slot.cost <= slot.limit or redis.call('ZSCORE', slot.key, slot.holder)
  end

  -- Does nobody who lives stand before this one?
  local function is_turn(key, token)
    for other, text, number in walk(key) do
      if other == token then return true end
      if listens(other, fields(text, 1)[1]) then return false end
      skip(key, other, number)
    end
    return true
  end

  function self.hold(slot, lease)
    redis.call('ZADD', slot.key, 'GT', members(slot.holder, now + lease))
    if redis.call('PTTL', slot.key) < lease then redis.call('PEXPIRE', slot.key, lease) end
  end

  -- It stands in no line any more, and is forgotten, at once or after so many ms. The keys of the lines that it stood in are
  -- added to `left`.
  function self.leave(one, left, kept)
    for _, slot in ipairs(one.slots) do
      if redis.call('ZREM', beside(slot.key, 'queue'), one.token) == 1 then left[#left + 1] = slot.key end
    end
    redis.call('PEXPIRE', record(one.slots[1].key, one.token), kept or 0)
    return left
  end

  -- The number of a newcomer: the time in microseconds, so that it tells for how long somebody waits, but more than the last.
  function self.next_number(queue, micros)
    if redis.call('ZCOUNT', queue, string.format('%.0f', micros), '+inf') == 0 then return micros end
    local size = redis.call('ZCARD', queue)
    return redis.call('ZRANGEBYSCORE', queue, '-inf', '+inf', 'WITHSCORES', 'LIMIT', size - 1, 1)[2] + 1
  end

  -- How many stand there, without those who have not asked for long; who those are is looked up once a second.
  function self.living(key)
    local queue, looked = beside(key, 'queue'), beside(key, 'looked')
    if redis.call('PTTL', looked) < 0 then
      redis.call('SET', looked, '1', 'PX', 1000)
      for _, token in ipairs(redis.call('ZRANGEBYSCORE', queue, '-inf', '+inf')) do
        if not redis.call('MGET', record(key, token))[1] then redis.call('ZREM', queue, token) end
      end
    end
    return redis.call('ZCARD', queue)
  end

  local function stands_elsewhere(one, key)
    for _, slot in ipairs(one.slots) do
      if slot.key ~= key and redis.call('ZSCORE', beside(slot.key, 'queue'), one.token) then return true end
    end
  end

  -- What the one at the head can have there: all of it, or not even this one, or not another one.
  local function fits(one, key)
    local all, here, free = true, true, {}
    for number, slot in ipairs(one.slots) do
      local room = self.has_room(slot)
      free[number] = room and (slot.key == key or is_turn(slot.key, one.token))
      if slot.blocks and not free[number] then
        all = false
        if slot.key == key then here = false end
      end
    end
    return all, here, free
  end

  -- It was let in already, while the slot moved or by a server of which this one has not heard all: it does not wait any more.
  local function holds(one, key)
    for _, slot in ipairs(one.slots) do
      if slot.key == key then return redis.call('ZSCORE', key, slot.holder) end
    end
  end

  function self.grant(keys)
    local due, number = {unpack(keys)}, 1
    while due[number] do
      local key = due[number]
      self.stops[key] = nil
      number = number + 1
      for token, text, place_number in walk(key) do
        local one = self.described(token, text)
        local all, here, free = fits(one, key)
        if holds(one, key) then
          self.leave(one, due)
        elseif all and tell(one) then
          for each, slot in ipairs(one.slots) do
            if free[each] then self.hold(slot, math.min(slot.lease, GRANT)) end
          end
          self.leave(one, due, GRANT) -- until it asks, it can be taken back: see `back`
          self.granted = self.granted + 1
        elseif here and not all and (stands_elsewhere(one, key) or one.channel == '' or tell(one)) then
          redis.call('ZREM', beside(key, 'queue'), token) -- it keeps nothing free that it cannot take
        elseif listens(token, one.channel) then
          self.stops[key] = token
          break
        else
          skip(key, token, place_number)
        end
      end
    end
  end

  return self
end
