-- POSTs of a message of the usual length; prints the rate, the failures and the 99th percentile in ms.
wrk.method = "POST"
wrk.headers["content-type"] = "application/x-www-form-urlencoded"
wrk.body = "msg=a+message+of+the+usual+length%2C+about+sixty+five+bytes+of+text"
function done(summary, latency)
    local errors = summary.errors
    local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
    io.stderr:write(string.format("%.0f %d %.1f\n", summary.requests / summary.duration * 1e6,
        failed, latency:percentile(99) / 1000))
end
