-- What stands in the sorted set for a holder: its name, and a filler for each unit of its cost beyond the first, so that the
-- number of members is the count. They all have one score, and so come and go together. The name says the cost.
--
-- This text goes before each of the scripts. With a score that of each member stands before it, as ZADD wants it.
local function members(holder, score)
  local token, cost = string.match(holder, '^([^\n]*\n)%d+x(%d+)\n')
  local list = {score, holder}
  if not score then list = {holder} end
  for number = 2, tonumber(cost or 1) do
    if score then list[#list + 1] = score end
    list[#list + 1] = token .. number
  end
  return unpack(list)
end
