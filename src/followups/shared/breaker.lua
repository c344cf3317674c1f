-- Adds outcomes to the state of a transport, and says how many of those that are wanted may begin.
-- KEYS: the state, a hash; sets of who failed since the last success, of the lanes whose last attempt failed, and of those
-- that are held while it is not closed. All times are milliseconds of Redis' own clock.

local state, failing, lanes, held = unpack(KEYS)
local threshold, wanted, succeeded = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3] == '1'
local first_pause, longest_pause, probes = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local first_rate, last_rate, fails_again, kept = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9]), ARGV[10]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local failed, failing_lanes, well_lanes = cjson.decode(ARGV[11]), cjson.decode(ARGV[12]), cjson.decode(ARGV[13])

if succeeded then redis.call('DEL', failing) end
for _, id in ipairs(failed) do redis.call('SADD', failing, id) end
for _, lane in ipairs(failing_lanes) do redis.call('SADD', lanes, lane) end
for _, lane in ipairs(well_lanes) do redis.call('SREM', lanes, lane) end
for _, set in ipairs({failing, lanes}) do redis.call('EXPIRE', set, kept) end

local known = redis.call('HMGET', state, 'name', 'until', 'tries', 'since', 'at', 'tokens')
local name, tries = known[1] or 'closed', tonumber(known[3] or 0)
local permits, changed = 0, 0

local function become(next_name, ...)
    name, changed = next_name, 1
    redis.call('HSET', state, 'name', name, ...)
end
local function open()
    local pause = math.min(first_pause * 2 ^ tries, longest_pause)
    become('open', 'since', tries == 0 and now or known[4] or now, 'until', now + pause, 'tries', tries + 1)
    redis.call('DEL', failing)
    -- Anew each time: one that has succeeded meanwhile is let go.
    redis.call('SUNIONSTORE', held, lanes)
end
local function grant(most)
    permits = math.min(wanted, math.floor(most))
    return permits
end

if name == 'closed' then
    if redis.call('SCARD', failing) >= threshold then open() end
elseif name == 'recovering' then
    if redis.call('SCARD', failing) >= fails_again then
        open()
    else
        local rate = first_rate * 2 ^ ((now - tonumber(known[2])) / 1000)
        if rate >= last_rate then
            redis.call('DEL', state, held)
            name, changed = 'closed', 1
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
    -- Also when the probes' outcomes do not come: whoever had them may have died.
    become('probing', 'until', now + longest_pause)
    grant(probes)
end
if name == 'closed' then return {name, permits, changed, {}} end
for _, lane in ipairs(failing_lanes) do redis.call('SADD', held, lane) end
for _, set in ipairs({state, held}) do redis.call('EXPIRE', set, kept) end
return {name, permits, changed, redis.call('SMEMBERS', held)}
