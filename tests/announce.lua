-- The announces of tests/bench.py, for wrk. It reads these environment variables:
--   HASHES  file of info_hashes, 40 hex digits per line
--   SWARMS  number of swarms
--   PEERS   peers per swarm
--   WARM    1: announce each peer once, in order, then exit; otherwise pick at random
-- One peer in three is a seeder. Peers share an address and differ in peer_id and port,
-- so only the first 64,000 of a swarm announce.
-- Each announce has a connection of its own, as those of most clients do.
local swarms = tonumber(os.getenv("SWARMS"))
local peers = math.min(tonumber(os.getenv("PEERS")), 64000)
local warm = os.getenv("WARM") == "1"
local escaped, next_peer, answered = {}, -1, 0
for line in io.lines(os.getenv("HASHES")) do
  escaped[#escaped + 1] = (line:gsub("..", "%%%0"))
end
math.randomseed(42)

request = function()
  next_peer = warm and (next_peer + 1) % (swarms * peers) or math.random(0, swarms * peers - 1)
  local member = math.floor(next_peer / swarms)
  return string.format(
    "GET /announce?info_hash=%s&peer_id=-TR4040-%012d&port=%d&uploaded=0&downloaded=0"
      .. "&left=%d&numwant=50&key=2C4DEC5F&compact=1&supportcrypto=1 HTTP/1.1\r\n"
      .. "Host: t\r\nUser-Agent: Transmission/4.04\r\nAccept-Encoding: deflate, gzip\r\n"
      .. "Connection: close\r\n\r\n",
    escaped[next_peer % swarms + 1], next_peer, 1024 + member * 7 % 64000,
    member % 3 == 0 and 0 or 1000)
end

if warm then  -- wrk stops after a time, but not after a number of requests
  response = function()
    answered = answered + 1
    if answered >= swarms * peers then os.exit(0) end
  end
end
