#!lua flags=no-writes,allow-cross-slot-keys
-- Reads parts of partitions of this node.
--
-- ARGV: ZRANGEBYLEX or ZREVRANGEBYLEX, then for each part: the key of the partition, where it
-- begins and ends in the command's own notation, the most members, and the most bytes of whole
-- members.
--
-- Returns for each part a list: the members that fit into the bytes; then one string with 20 bytes
-- for each member after them that was looked at, its UUID and its size (big-endian); then 1 if more
-- members may follow.

-- When only UUIDs and sizes are wanted, members are looked at up to about this many bytes.
local SCAN_BYTES = 16384

-- When so many bytes were looked at, one member of each further partition has to do.
local CALL_BYTES = 1048576

local seen_in_all = 0

-- How many members are taken at first: most parts of a page have fewer.
local FIRST_MEMBERS = 16

local command = ARGV[1]
local seen_in_all = 0

-- The first members of a part, until they are more than the bytes; what they are together, and
-- whether there may be more. Their number is doubled each time, so that not much more than twice as
-- much is looked at as is needed.
local function first_members(key, from, to, count, bytes)
    local more = math.min(FIRST_MEMBERS, count)
    if seen_in_all > CALL_BYTES then
        more = 1
    end
    local members = redis.call(command, key, from, to, 'LIMIT', 0, more)
    local seen = #table.concat(members)
    seen_in_all = seen_in_all + seen
    local has_more = #members == more
    while has_more and #members < count and seen <= bytes and seen_in_all <= CALL_BYTES do
        more = math.min(#members, count - #members)
        local found = redis.call(command, key, from, to, 'LIMIT', #members, more)
        for i = 1, #found do
            members[#members + 1] = found[i]
            seen = seen + #found[i]
            seen_in_all = seen_in_all + #found[i]
        end
        has_more = #found == more
    end
    return members, seen, has_more and 1 or 0
end

local reply = {}
for i = 2, #ARGV, 5 do
    local bytes = tonumber(ARGV[i + 4])
    local looked_at = bytes > 0 and bytes or SCAN_BYTES
    local members, seen, has_more =
        first_members(ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3]), looked_at)
    local part, heads = members, {}
    if seen > bytes then
        part = {}
        for j = 1, #members do
            local member = members[j]
            bytes = bytes - #member
            if bytes >= 0 and #heads == 0 then
                part[#part + 1] = member
            else
                heads[#heads + 1] = string.sub(member, 1, 16) .. struct.pack('>I4', #member)
            end
        end
    end
    part[#part + 1] = table.concat(heads)
    part[#part + 1] = has_more
    reply[#reply + 1] = part
end
return reply
