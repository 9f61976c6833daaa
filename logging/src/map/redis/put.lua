#!lua flags=allow-cross-slot-keys
-- Puts entries into partitions of this server.
--
-- ARGV: the maximum age of a new entry, the age from which it is certainly too old, and how far
-- ahead of this server's clock it may be, in milliseconds; the times of the oldest and of the
-- newest entry, in milliseconds since the Unix epoch; the key of the fence; then for each entry the key
-- of its partition and its member: 16 bytes of UUID, then the message. If the byte after the UUID is 255,
-- the message is large: its key and the message follow.
--
-- Returns one letter for each entry (s stored, d duplicate, c conflict, o too old, l leaving: too
-- old only by this server's clock, a ahead, e not executed), and the error of the last e.

-- The fence: WAIT needs a write in every group. It comes first: if it fails, nothing was executed.
local fence = redis.pcall('INCR', ARGV[6])
if type(fence) == 'table' then
    return redis.error_reply('NOFENCE ' .. fence.err)
end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local oldest, settled, newest = now - ARGV[1], now - ARGV[2], now + ARGV[3]
local may_all_be_new = tonumber(ARGV[4]) >= oldest and tonumber(ARGV[5]) <= newest
local outcomes, failure = {}, ''

-- The outcome that the entry's time forces on a new entry, or nil.
local function staleness(uuid)
    local millis = 0
    for i = 1, 6 do
        millis = millis * 256 + string.byte(uuid, i)
    end
    if millis < settled then
        return 'o'
    end
    if millis < oldest then
        return 'l'
    end
    if millis > newest then
        return 'a'
    end
end

-- Numbers are passed as text: Redis formats a Lua number with printf's %.17g, a tenth of this function's time.
local function put(key, member, message_key, message)
    local uuid = string.sub(member, 1, 16)
    local found = redis.pcall('ZRANGEBYLEX', key, '[' .. uuid, '+', 'LIMIT', '0', '1')
    if found.err then
        failure = found.err
        return 'e'
    end
    -- The last mark follows every entry.
    if not found[1] then
        failure = 'NOMARK ' .. key .. ' is missing'
        return 'e'
    end
    if found[1] == member and message_key then
        local stored = redis.pcall('GET', message_key)
        if type(stored) ~= 'string' then
            failure = stored and stored.err or 'NOMARK ' .. message_key .. ' is missing'
            return 'e'
        end
        return stored == message and 'd' or 'c'
    end
    if found[1] == member then
        return 'd'
    end
    if string.sub(found[1], 1, 16) == uuid then
        return 'c'
    end
    local stale = not may_all_be_new and staleness(uuid)
    if stale then
        return stale
    end
    -- The message first: without a member it is not an entry, and a retry writes it again.
    if message_key then
        local set = redis.pcall('SET', message_key, message)
        if set.err then
            failure = set.err
            return 'e'
        end
    end
    local added = redis.pcall('ZADD', key, '0', member)
    if type(added) == 'table' then
        failure = added.err
        return 'e'
    end
    return 's'
end

local i, entry, arguments = 7, 0, #ARGV
while i <= arguments do
    entry = entry + 1
    local is_large = string.byte(ARGV[i + 1], 17) == 255
    if is_large then
        outcomes[entry] = put(ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3])
        i = i + 4
    else
        outcomes[entry] = put(ARGV[i], ARGV[i + 1])
        i = i + 2
    end
end
return { table.concat(outcomes), failure }
