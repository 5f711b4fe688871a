-- Take a slot of every blocking semaphore, or of none; then of each other one that has room.
--
-- KEYS   one semaphore each: a sorted set, see `members`; score = the end of the lease (ms of this server's clock)
-- ARGV   four for each: limit, lease in ms, 1 if it blocks else 0, the holder. With a cost of more than 1, twice what it is
--        more is added to the third, and 4096 if whoever asks may wait.
-- Returns one integer each (for a single one not in a list): twice its count, plus 1 where it has room (or is held now), and
--         -1 minus that where somebody who may wait has used its policy within a lease. If a blocking one has no room, nothing
--         was taken.
--
-- Asking twice is asking once: who holds already is let in before the limit is looked at. What has lapsed is removed only
-- where there is no room. A key's expiry only ever grows, so that a short lease never ends a longer one. Nobody gets before
-- those who wait: they are let in first, and where one of them has no room yet, nobody else has; but see `moves`.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local room, count, cost, marked, line, taken, away = {}, {}, {}, {}, nil, 1, nil
local anybody = redis.pcall('PTTL', string.match(KEYS[1], '^[^}]*}:1:') .. '!waits')
if type(anybody) == 'table' then away = true else anybody = anybody >= 0 end
repeat
  local queues = {}
  taken = 1
  for i, key in ipairs(KEYS) do
    local limit, asked = tonumber(ARGV[4 * i - 3]), tonumber(ARGV[4 * i - 1])
    local waits = asked >= 4096
    if waits then asked = asked - 4096 end
    local blocks = asked % 2
    cost[i] = (asked - blocks) / 2 + 1
    count[i] = redis.call('ZCARD', key)
    room[i] = 1
    if count[i] + cost[i] > limit and not redis.call('ZSCORE', key, ARGV[4 * i]) then
      if redis.call('ZREMRANGEBYSCORE', key, '-inf', now) > 0 then
        count[i] = redis.call('ZCARD', key)
      end
      if count[i] + cost[i] > limit then room[i] = 0 end
    end
    if not line then
      if away == nil and (waits or anybody) then away = moves(key) end
      if waits and not away then mark(key, tonumber(ARGV[4 * i - 2])) end
      marked[i] = waits or away or anybody and redis.call('PTTL', mark_of(key)) >= 0
    end
    if marked[i] and not away and room[i] == 1 and not redis.call('ZSCORE', key, ARGV[4 * i]) then
      if not line then
        if redis.call('ZCARD', beside(key, 'queue')) > 0 then queues[#queues + 1] = key end
      else
        local other = line.stops[key]
        if other and other ~= string.match(ARGV[4 * i], '^[^\n]*') then room[i] = 0 end
      end
    end
    if room[i] == 0 and blocks == 1 then taken = 0 end
  end
  local look = not line and queues[1]
  if look then
    line = lines(now)
    line.grant(queues)
  end
until not look
local reply = {}
for i, key in ipairs(KEYS) do
  if taken == 1 and room[i] == 1 then
    local lease = tonumber(ARGV[4 * i - 2])
    if cost[i] == 1 then
      count[i] = count[i] + redis.call('ZADD', key, now + lease, ARGV[4 * i])
    else
      count[i] = count[i] + redis.call('ZADD', key, members(ARGV[4 * i], now + lease))
    end
    if redis.call('PTTL', key) < lease then redis.call('PEXPIRE', key, lease) end
  end
  reply[i] = 2 * count[i] + room[i]
  if marked[i] then reply[i] = -1 - reply[i] end
end
if reply[2] then return reply end
return reply[1]
