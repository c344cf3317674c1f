-- Add outcomes to the breaker's state for a transport, and return how many of the wanted follow-ups may begin.
-- KEYS: the state, a hash; the set of follow-ups that failed since the last success; a hash with each workspace's number
-- of successive failed attempts; and the set of workspaces that are tripped while the breaker is not closed. All times
-- are in milliseconds.

-- Longest time between two reports. Workers report every second, so a longer time is a step of this server's clock.
local MOST = 2000

local state, failing, runs, tripped = unpack(KEYS)
local threshold, wanted, succeeded = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3] == '1'
local first_pause, longest_pause, probes = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local first_rate, last_rate, failures_to_reopen, kept = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9]), ARGV[10]
local failures_to_trip, failed, workspaces = tonumber(ARGV[11]), cjson.decode(ARGV[12]), cjson.decode(ARGV[13])

local known = redis.call('HMGET', state, 'name', 'until', 'tries', 'since', 'at', 'tokens', 'clock', 'seen')
local name, tries = known[1] or 'closed', tonumber(known[3] or 0)
local permits, changed = 0, 0

-- The state has a separate clock, since the server's clock may be set while the breaker is not closed. If the server's
-- clock were set back by an hour, the pause would last for an hour. If it were set forward, all follow-ups would begin
-- immediately instead of gradually.
local time = redis.call('TIME')
local seen = time[1] * 1000 + math.floor(time[2] / 1000)
local now = seen
if known[7] then now = known[7] + math.min(math.max(seen - known[8], 0), MOST) end

if succeeded then redis.call('DEL', failing) end
for _, id in ipairs(failed) do redis.call('SADD', failing, id) end
local newly_tripped = {}
for _, one in ipairs(workspaces) do
    local key, failures, anew = one[1], one[2], one[3]
    if anew then redis.call('HDEL', runs, key) end
    if failures > 0 and redis.call('HINCRBY', runs, key, failures) >= failures_to_trip then table.insert(newly_tripped, key) end
end
for _, key in ipairs({failing, runs}) do redis.call('EXPIRE', key, kept) end

local function become(next_name, ...)
    name, changed = next_name, 1
    redis.call('HSET', state, 'name', name, ...)
end
local function close()
    redis.call('DEL', state, tripped)
    name, changed = 'closed', 1
end
-- Tripped workspaces are computed again each time: a tripped workspace stays tripped if its last attempt failed, for
-- which one failure is enough.
local function trip()
    local all, keys = redis.call('HGETALL', runs), {}
    for number = 1, #all, 2 do
        local key, failures = all[number], tonumber(all[number + 1])
        if failures >= failures_to_trip or redis.call('SISMEMBER', tripped, key) == 1 then table.insert(keys, key) end
    end
    redis.call('DEL', tripped)
    for _, key in ipairs(keys) do redis.call('SADD', tripped, key) end
    return #keys > 0
end
local function open()
    if not trip() then
        -- If no workspace is tripped, no success could close the breaker.
        if name ~= 'closed' then close() end
        return
    end
    local pause = math.min(first_pause * 2 ^ tries, longest_pause)
    become('open', 'since', tries == 0 and now or known[4] or now, 'until', now + pause, 'tries', tries + 1)
    redis.call('DEL', failing)
end
local function grant(most)
    permits = math.min(wanted, math.floor(most))
    return permits
end

if name == 'closed' then
    if redis.call('SCARD', failing) >= threshold then open() end
elseif name == 'recovering' then
    if redis.call('SCARD', failing) >= failures_to_reopen then
        open()
    else
        local rate = first_rate * 2 ^ ((now - tonumber(known[2])) / 1000)
        if rate >= last_rate then
            close()
        else
            local tokens = math.min(rate, tonumber(known[6]) + (now - tonumber(known[5])) / 1000 * rate)
            redis.call('HSET', state, 'at', now, 'tokens', tokens - grant(tokens))
        end
    end
elseif succeeded then
    become('recovering', 'until', now, 'at', now, 'tokens', 0)
elseif name == 'probing' and #failed > 0 then
    open()
elseif now >= tonumber(known[2]) and wanted > 0 then
    -- A new probe begins even if the outcomes of the last probe never arrive, since their worker may have crashed.
    become('probing', 'until', now + longest_pause)
    grant(probes)
end
if name == 'closed' then return {name, permits, changed, {}} end
redis.call('HSET', state, 'clock', now, 'seen', seen)
for _, key in ipairs(newly_tripped) do redis.call('SADD', tripped, key) end
for _, key in ipairs({state, tripped}) do redis.call('EXPIRE', key, kept) end
return {name, permits, changed, redis.call('SMEMBERS', tripped)}
