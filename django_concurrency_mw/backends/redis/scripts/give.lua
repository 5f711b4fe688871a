-- Give a holder's slot back, of a cost of more than 1: else ZREM says the same in fewer bytes.
--
-- KEYS   the semaphore
-- ARGV   the holder
-- Returns how many members there were of it.
return redis.call('ZREM', KEYS[1], members(ARGV[1]))
