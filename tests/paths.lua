-- Requests of tests/bench.py that are no announces, for wrk. Environment:
--   PATHS  file of paths, one a line, of which each request takes one at random
local paths = {}
for line in io.lines(os.getenv("PATHS")) do
  paths[#paths + 1] = line
end
math.randomseed(42)

request = function()
  return string.format(
    "GET %s HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n", paths[math.random(#paths)])
end
