-- The take that nearly all are, before anything else is made that others need: by one who may not wait, a slot each, where there
-- is room for all and nobody of the prefix waits. See `take` for what is given and returned; whatever else it is goes on there.
local asked, counts = #KEYS, {}
for i = 1, asked do
  local how = ARGV[4 * i - 1]
  if how ~= '1' and how ~= '0' then counts = nil end
end
-- Where the hash slot moves this is an error, and so is not what it is compared with.
if counts and redis.pcall('PTTL', string.sub(KEYS[1], 1, string.find(KEYS[1], '}', 1, true)) .. ':1:!waits') == -2 then
  for i = 1, asked do
    local count = redis.call('ZCARD', KEYS[i])
    if count >= tonumber(ARGV[4 * i - 3]) then
      counts = nil
      break
    end
    counts[i] = count
  end
  if counts then
    local time = redis.call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    for i = 1, asked do
      local key, lease = KEYS[i], tonumber(ARGV[4 * i - 2])
      counts[i] = 2 * (counts[i] + redis.call('ZADD', key, now + lease, ARGV[4 * i])) + 1
      if redis.call('PTTL', key) < lease then redis.call('PEXPIRE', key, lease) end
    end
    if asked == 1 then return counts[1] end
    return counts
  end
end
