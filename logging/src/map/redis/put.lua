#!lua flags=allow-cross-slot-keys
-- Puts entries into partitions of this server, and raises floors of partitions.
--
-- ARGV: the key of the fence; the last mark of each partition of this map; the map's clock; the settle
-- window, empty if entries of any age are taken; how long after it an entry's time is settled; how far
-- ahead of the clock a new entry may be; the times of the oldest and of the newest entry. Then for each
-- entry the key of its partition and its member: 16 bytes of UUID, then the message; if the byte after the
-- UUID is 255, the message is large: its key and the message follow. Or the key of a partition, an empty
-- member, and the floor to which its floor is raised. Times are in milliseconds, since the Unix epoch or
-- as a difference.
--
-- Returns one letter for each entry or floor (s stored, d duplicate, c conflict, o too old for ever, l
-- leaving: too old, and not for ever yet, a ahead, e not executed), the error of the last e, and the
-- greatest floor of the partitions that were used.

-- The fence: WAIT needs a write in every group. It comes first: if it fails, nothing was executed.
local fence = redis.pcall('INCR', ARGV[1])
if type(fence) == 'table' then
    return redis.error_reply('NOFENCE ' .. fence.err)
end

-- One of the two clocks may have been stepped. Too much that is taken does no harm: floors protect what
-- was told as settled.
local time = redis.call('TIME')
local own, told = time[1] * 1000 + math.floor(time[2] / 1000), tonumber(ARGV[3])
local takes_any_age = ARGV[4] == ''
local settle = tonumber(ARGV[4]) or math.huge
local oldest = math.min(own, told) - settle
local settled = oldest - ARGV[5]
local newest = math.max(own, told) + ARGV[6]
local first, last = tonumber(ARGV[7]), tonumber(ARGV[8])
local mark = ARGV[2]
local floors, greatest_floor = {}, 0
local outcomes, failure = {}, ''

local function floor_key(key)
    return 'fence:' .. string.sub(key, 9) .. ':floor'
end

-- The floor of a partition of this map; nil after a failure. Below it nothing is new any more. `found` is what
-- the partition has behind an entry: mostly the mark already.
local function floor_of(key, found)
    local floor = floors[key]
    if floor then
        return floor
    end
    if found ~= mark then
        local last = redis.pcall('ZREVRANGE', key, '0', '0')
        if last.err or last[1] ~= mark then
            failure = last.err or ('NOMARK ' .. key .. ' is not a partition of this map: it was lost')
            return nil
        end
    end
    local stored = redis.pcall('GET', floor_key(key))
    if type(stored) == 'table' then
        failure = stored.err
        return nil
    end
    floor = tonumber(stored or 0)
    floors[key] = floor
    greatest_floor = math.max(greatest_floor, floor)
    return floor
end

-- Whether the floor of the partition is at least this one now.
local function raise(key, floor)
    local stored = floor_of(key)
    if not stored then
        return false
    end
    if stored < floor then
        local set = redis.pcall('SET', floor_key(key), string.format('%.0f', floor))
        if set.err then
            failure = set.err
            return false
        end
        floors[key] = floor
        greatest_floor = math.max(greatest_floor, floor)
    end
    return true
end

-- The outcome that the entry's time forces on a new entry, or nil.
local function staleness(key, uuid, floor)
    if takes_any_age then
        floor = 0
    end
    if first >= oldest and first >= floor and last <= newest then
        return nil
    end
    local millis = 0
    for i = 1, 6 do
        millis = millis * 256 + string.byte(uuid, i)
    end
    if millis < floor then
        return 'o'
    end
    if millis < settled then
        -- "Never" is told only of what the floor forbids.
        return raise(key, settled) and 'o' or 'e'
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
    -- The last mark follows every entry.
    local found = redis.pcall('ZRANGEBYLEX', key, '[' .. uuid, '+', 'LIMIT', '0', '1')
    if found.err then
        failure = found.err
        return 'e'
    end
    local floor = floor_of(key, found[1])
    if not floor then
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
    local stale = staleness(key, uuid, floor)
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

local i, entry, arguments = 9, 0, #ARGV
while i <= arguments do
    entry = entry + 1
    local key, member = ARGV[i], ARGV[i + 1]
    if member == '' then
        outcomes[entry] = raise(key, tonumber(ARGV[i + 2])) and 's' or 'e'
        i = i + 3
    elseif string.byte(member, 17) == 255 then
        outcomes[entry] = put(key, member, ARGV[i + 2], ARGV[i + 3])
        i = i + 4
    else
        outcomes[entry] = put(key, member)
        i = i + 2
    end
end
return { table.concat(outcomes), failure, string.format('%.0f', greatest_floor) }
