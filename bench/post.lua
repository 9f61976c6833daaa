-- POSTs of a message of the usual length; prints the rate, the failures, the 50th and the 99th percentile in ms.
-- RIVAL=nginx sends the entries that a facade would send, as nginx makes none; RIVAL=webdis sends a command.
local form = "a+message+of+the+usual+length%2C+about+sixty+five+bytes+of+text"
local text = "a message of the usual length, about sixty five bytes of text"
local rival = os.getenv("RIVAL")
wrk.method = "POST"
if rival == "nginx" then
    wrk.headers["content-type"] = "application/json"
elseif rival == "webdis" then
    wrk.body = "RPUSH/log/" .. text
else
    wrk.headers["content-type"] = "application/x-www-form-urlencoded"
    wrk.body = "msg=" .. form
end

function setup(thread)
    threads = (threads or 0) + 1
    thread:set("seed", os.time() + threads)
end

function init()
    math.randomseed(seed)
end

if rival == "nginx" then
    local count = 0
    local thread_number
    -- A version 7 UUID; seconds are precise enough for the settle window.
    function request()
        thread_number = thread_number or math.random(0, 16383)
        count = count + 1
        local millis = os.time() * 1000
        local uuid = string.format("%08x-%04x-7000-%04x-%012x", math.floor(millis / 65536), millis % 65536,
            32768 + thread_number, count)
        return wrk.format(nil, nil, nil, '{"uuid":"' .. uuid .. '","msg":"' .. text .. '"}')
    end
end

function done(summary, latency)
    local errors = summary.errors
    local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
    io.stderr:write(string.format("%.0f %d %.2f %.1f\n", summary.requests / summary.duration * 1e6,
        failed, latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
